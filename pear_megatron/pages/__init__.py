"""What people look at: HTML pages from templates, and figures, in one style."""
