"""What the HTML pages of several stages share: looks, colours, pictures with their regions. A page loads nothing."""
