"""Parts of the commands that check theory."""
