"""What authors of the course use; no notebook imports it."""
