"""The PaddlePaddle networks, and what describes them."""
