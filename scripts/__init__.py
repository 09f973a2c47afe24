"""Command line programs; nothing imports them but each other."""
