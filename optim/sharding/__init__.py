"""How parameters and state are partitioned over a mesh of devices."""
