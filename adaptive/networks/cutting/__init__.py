"""Any timm model cut into blocks at its branch points, by recording one forward pass."""
