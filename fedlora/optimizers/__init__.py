"""How clients step: the optimisers that a scenario names, and what of them is fedlora's own."""
