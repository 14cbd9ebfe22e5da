// A separate file, because the content security policy forbids inline scripts.
SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "openapi.json",
  validatorUrl: null, // otherwise the description is sent to an online validator
  deepLinking: true,
});
