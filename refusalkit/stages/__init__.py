"""Hold the five stages; each takes artifacts and its own recipe section and returns one artifact."""
