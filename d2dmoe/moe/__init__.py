"""All that a loaded checkpoint needs: the layer, its packing, its gate and the loader."""
