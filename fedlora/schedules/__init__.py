"""How the adapter itself changes over the rounds, a file each."""
