"""What only the lessons need: predictions and claims, figures, exercises, records."""
