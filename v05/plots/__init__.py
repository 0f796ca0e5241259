"""The pictures that commands draw, one file for each kind."""
