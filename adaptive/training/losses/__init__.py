"""The loss of a network with exits: cross entropy, distillation, exit weights, gradient surgery."""
