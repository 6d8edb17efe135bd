"""What an optimizer remembers: the state, how each leaf of it is stored, and trees."""
