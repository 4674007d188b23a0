"""The process that hosts an engine, and the messages that cross to it."""
