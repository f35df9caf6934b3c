"""Export students to formats that need no teacher-cache."""
