"""An engine whose network is split over several processes."""
