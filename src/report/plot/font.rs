//! The embedded font: measuring text with it, and turning SVG into PNG.

use std::sync::{Arc, LazyLock};

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{self, fontdb};

use super::PlotError;

/// Family names for the SVG: the embedded one, then what viewers without it have.
pub const FAMILY: &str = "Inter, Helvetica, Arial, sans-serif";

static FONTS: LazyLock<Arc<fontdb::Database>> = LazyLock::new(|| {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_data(include_bytes!("../../../assets/fonts/Inter-Regular.ttf").to_vec());
    fonts.load_font_data(include_bytes!("../../../assets/fonts/Inter-SemiBold.ttf").to_vec());
    fonts.set_sans_serif_family("Inter");
    Arc::new(fonts)
});

/// Width of a line of text at `size` pixels.
pub fn text_width(text: &str, size: f64, bold: bool) -> Result<f64, PlotError> {
    let weight = if bold { "bold" } else { "normal" };
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;");
    let probe = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="9999" height="99"><text y="50" font-family="Inter" font-size="{size}" font-weight="{weight}">{escaped}</text></svg>"#
    );
    Ok(f64::from(parse(&probe)?.root().abs_bounding_box().width()))
}

/// Renders `svg` at `scale` times its nominal size.
pub fn png(svg: &str, scale: f32) -> Result<Vec<u8>, PlotError> {
    let tree = parse(svg)?;
    let size = tree
        .size()
        .to_int_size()
        .scale_by(scale)
        .ok_or_else(|| PlotError::Draw(format!("no picture is {scale} times its size")))?;
    let mut pixels = Pixmap::new(size.width(), size.height())
        .ok_or_else(|| PlotError::Draw(format!("{} x {} pixels do not fit", size.width(), size.height())))?;
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixels.as_mut());
    pixels.encode_png().map_err(|e| PlotError::Draw(e.to_string()))
}

fn parse(svg: &str) -> Result<usvg::Tree, PlotError> {
    let options = usvg::Options { fontdb: FONTS.clone(), ..usvg::Options::default() };
    usvg::Tree::from_str(svg, &options).map_err(|e| PlotError::Draw(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_weights_are_there_and_wider_text_is_wider() {
        assert_eq!(FONTS.len(), 2);
        let regular = text_width("Time to first token", 12.0, false).unwrap();
        let bold = text_width("Time to first token", 12.0, true).unwrap();
        assert!(regular > 80.0 && bold > regular && bold < 150.0, "{regular} {bold}");
        assert!(text_width("a < b & c", 12.0, false).unwrap() > 0.0);
    }
}
