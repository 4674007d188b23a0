"""The plain, frozen types that cross the process boundary. Standard library only."""
