"""What holds for every HTTP exchange: middleware, connections, draining, server-sent events."""
