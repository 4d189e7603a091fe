"""Class folders as a source: which folders are splits and classes, what has to be asked, and the images in them."""
