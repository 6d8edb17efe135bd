"""What runs a step: the transformation, its operands, and its passes over leaves."""
