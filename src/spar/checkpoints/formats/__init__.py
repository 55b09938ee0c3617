"""Published formats: their files, their configurations, and the map of their tensor names to ours."""
