"""Programs that talk to the service over HTTP; they know nothing of its inside."""
