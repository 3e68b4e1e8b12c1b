"""What the stages `score` and `filter` judge pool images by. Every filter is a mask: changing one embeds nothing again."""
