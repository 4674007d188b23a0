"""Durable states of conversations: owned, named, forked, rewound, and sure to survive a crash whole or not at all."""
