//! What stands around the panels of every figure: title and subtitle above, the axis' caption and the footer below.

use super::canvas::{Anchor, Canvas, Font};
use super::render::{FAINT_INK, GUTTER, INK, MARGIN, wrap};
use super::{Options, PlotError};

const TITLE_SIZE: f64 = 19.0;
const TITLE_ROW: f64 = 24.0;
const SUBTITLE_SIZE: f64 = 12.5;
const SUBTITLE_ROW: f64 = 17.0;
const FOOTER_SIZE: f64 = 10.5;
const FOOTER_ROW: f64 = 15.0;
const CAPTION: &str = "adapter slots in device memory, gpu_loras (log scale)";

/// The texts, broken into rows.
pub(super) struct Page {
    /// Between the margins, pixels.
    inner: f64,
    title: Vec<String>,
    subtitle: Vec<String>,
    footer: Vec<String>,
}

impl Page {
    /// `shared` is what all panels have in common; `inner` is the width between the margins.
    pub fn new(title: &str, shared: &[String], options: &Options, inner: f64) -> Result<Self, PlotError> {
        Ok(Self {
            inner,
            title: wrap(title, " ", inner, TITLE_SIZE, true)?,
            subtitle: wrap(&shared.join(" · "), " · ", inner, SUBTITLE_SIZE, false)?,
            footer: wrap(&options.footer, " · ", inner, FOOTER_SIZE, false)?,
        })
    }

    /// Pixels of title and subtitle.
    pub fn head_height(&self) -> f64 {
        self.title.len() as f64 * TITLE_ROW + self.subtitle.len() as f64 * SUBTITLE_ROW
    }

    /// Pixels of caption and footer.
    pub fn foot_height(&self) -> f64 {
        26.0 + self.footer.len() as f64 * FOOTER_ROW
    }

    /// Draws title and subtitle; gives where a legend begins.
    pub fn draw_head(&self, canvas: &Canvas<'_>) -> Result<f64, PlotError> {
        let mut y = MARGIN;
        for row in &self.title {
            y += TITLE_ROW;
            let font = Font { size: TITLE_SIZE, bold: true, color: INK };
            canvas.text(row, (MARGIN, y - 6.0), Anchor::Start, font)?;
        }
        for row in &self.subtitle {
            y += SUBTITLE_ROW;
            canvas.text(row, (MARGIN, y - 4.0), Anchor::Start, faint(SUBTITLE_SIZE))?;
        }
        Ok(y + 8.0)
    }

    /// Draws caption and footer below panels that end at `y`.
    pub fn draw_foot(&self, canvas: &Canvas<'_>, y: f64) -> Result<(), PlotError> {
        let mut y = y + 16.0;
        let middle = MARGIN + GUTTER + (self.inner - GUTTER) / 2.0;
        let font = Font { size: SUBTITLE_SIZE, bold: false, color: INK };
        canvas.text(CAPTION, (middle, y), Anchor::Middle, font)?;
        y += 10.0;
        for row in &self.footer {
            y += FOOTER_ROW;
            canvas.text(row, (MARGIN, y), Anchor::Start, faint(FOOTER_SIZE))?;
        }
        Ok(())
    }
}

/// Text that stands back.
pub(super) fn faint(size: f64) -> Font {
    Font { size, bold: false, color: FAINT_INK }
}
