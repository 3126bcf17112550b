"""fedlora on real nodes: a Flower app, what a site runs beside its SuperNode, and how a run is submitted."""
