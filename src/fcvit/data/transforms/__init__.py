"""From an image to what the network sees."""
