"""What the network looks at: similarity maps and what is measured of them."""
