"""How a network is trained: the recipe, its schedule and optimizer, what a run keeps."""
