"""What pages about a run read: pictures, a map, and one row an image."""
