"""The examples: read, split over clients, encoded once."""
