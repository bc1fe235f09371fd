"""What development needs and users never load: the host as a process, its frontend in a browser, the demo."""
