"""What happens to a server on a bad day: a neighbour that does its worst, kills in the midst of everything."""
