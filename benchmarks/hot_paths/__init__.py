"""What the speed table measures, and how."""
