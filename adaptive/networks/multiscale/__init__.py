"""MSDNet and RANet, networks with exits of their own, and their registration with timm."""
