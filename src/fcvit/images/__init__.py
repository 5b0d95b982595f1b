"""Images from files: preprocessing, folders of labelled images."""
