"""The PaddlePaddle networks and their specifications."""
