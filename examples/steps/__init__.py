"""The steps world: a teacher that learned to solve arithmetic in few steps, and students that need many."""
