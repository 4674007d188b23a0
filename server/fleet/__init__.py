"""Many engines behind one address, with Ray Serve: which one gets a request, and how many there are."""
