"""Which rank this process is, and the network interface through which it meets the others."""
