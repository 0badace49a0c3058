// A file and not a script in the page, so that the page's policy allows none of those.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  validatorUrl: null,           // no other host is asked
  queryConfigEnabled: false,    // a link to this page chooses no other description
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
});
