"""How a network is trained: the recipe, its schedule and optimiser, what a run keeps."""
