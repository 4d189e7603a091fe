"""From the bytes of an image file to pixels, and from pixels to the tensors that networks take."""
