"""What only the lessons need: guesses and claims, exercises, and what was measured."""
