"""DeepSpeed behind one adapter: the process group, its settings, backward and step."""
