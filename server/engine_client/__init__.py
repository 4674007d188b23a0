"""The service's side of the engine: starts its process, sends requests, hands out what comes back."""
