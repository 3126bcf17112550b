"""How a pass through the model is made quick and stays exact for each example."""
