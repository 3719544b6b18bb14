"""The writers of a run's metrics, by destination."""
