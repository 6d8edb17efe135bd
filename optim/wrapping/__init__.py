"""Any optax transformation with its state in 8 bits."""
