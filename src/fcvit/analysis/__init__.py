"""Draw similarity maps on images and measure their properties."""
