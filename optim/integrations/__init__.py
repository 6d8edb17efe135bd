"""Octavo in other libraries' training loops; each is imported only when asked for."""
